"""The HTML page of an ablation: its data by hand, what is in it, and what it does in headless Chromium."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from naming import names
from test_ablation_report import FACTS, UBER
from tiny_grid import POINTS, make_questions, write_grid

from embedft.ablation import page
from embedft.ablation.effects import measure_effects
from embedft.ablation.grid import EVAL, WINDOWS, Grid
from embedft.ablation.page import format_page, page_data
from embedft.ablation.results import Results
from embedft.cli import main
from embedft.files import write_jsonl

HAZARD = "</script><!-- <script>alert('a\"b')</script> & 日本語 \u2028 \\u003c %"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def load(out: Path, metrics: tuple[str, ...] = ("mrr@10",)):
    results = Results.load(out)
    return results, measure_effects(results, metrics)


def data_in(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return json.loads(found)


def test_the_questions_that_changed_by_hand(tmp_path):
    write_grid(tmp_path / "out", {"uber": UBER, "facts": FACTS})
    found = page_data(*load(tmp_path / "out"))
    changed = found["changed"]["uber"]
    # test_ablation_report.py: mean reciprocal ranks are above BASE's by 1/4, 1/2 and 1/4 on questions 0 to 2.
    points = changed["points"]["mrr@10"]
    (first, second, third), other = points[1]["questions"], points[2]["questions"]
    assert [changed["questions"][one["question"]][0] for one in (first, second, third)] == ["q1", "q0", "q2"]
    assert (first["before"], first["after"]) == (0.5, 1.0)
    assert (first["ranks_before"], first["ranks_after"]) == ([2, 2], [1, 1])
    assert (second["ranks_before"], second["ranks_after"]) == ([2, 2], [1, 2])
    assert changed["passages"][first["passage"]] == ("d1", "passage 1", False)
    assert points[1]["num_changed"] == 3
    # Not found: no rank. That question is the only one that changed there.
    ((last, *others),) = [other]
    assert (last["ranks_before"], last["ranks_after"], others) == ([4, 5], [4, None], [])
    assert changed["questions"][last["question"]] == ("q3", "question 3")


def test_the_questions_that_changed_are_those_of_each_metric(tmp_path):
    """By hand: at rank 1, BASE has no right document, the point 1 that of question 1 with both seeds, 0 with one."""
    write_grid(tmp_path / "out", {"uber": UBER})
    alone = page_data(*load(tmp_path / "out"))["changed"]["uber"]
    both = page_data(*load(tmp_path / "out", ("mrr@10", "hit_rate@1")))["changed"]["uber"]
    assert both["points"]["mrr@10"] == alone["points"]["mrr@10"]
    found = both["points"]["hit_rate@1"]
    changes = [(both["questions"][one["question"]][0], one["before"], one["after"]) for one in found[1]["questions"]]
    assert changes == [("q1", 0.0, 1.0), ("q0", 0.0, 0.5)]
    assert found[1]["num_changed"] == 2
    assert found[2]["questions"] == []
    assert (both["questions"], both["passages"]) == (alone["questions"], alone["passages"])  # once


def test_a_passage_is_cut_to_its_window_or_its_beginning(tmp_path, monkeypatch):
    long = make_questions(4, passage="abc " * 300 + "{}")
    grid = write_grid(tmp_path / "out", {"uber": UBER}, datasets={"uber": long})
    cell = next(cell for cell in grid.cells if cell.point == POINTS[1] and cell.seed == 0)
    windows = [{"query_id": "q1", "document_id": "d1", "start": 4, "end": 12}]
    write_jsonl(grid.folder(cell) / EVAL / "uber" / WINDOWS, windows)
    changed = page_data(*load(tmp_path / "out"))["changed"]["uber"]
    one, two, _ = (changed["passages"][each["passage"]] for each in changed["points"]["mrr@10"][1]["questions"])
    assert one == ("d1", "... abc abc  ...", True)
    assert two == ("d0", ("abc " * 300)[: page.MOST_CHARACTERS] + " ...", False)


def test_the_size_is_bounded_and_the_bound_is_stated(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_QUESTIONS", 2)
    write_grid(tmp_path / "out", {"uber": UBER})
    found = page_data(*load(tmp_path / "out"))
    points = found["changed"]["uber"]["points"]["mrr@10"]
    assert len(points[1]["questions"]) == 2
    assert points[1]["num_changed"] == 3
    assert names(found["bound"], 2, page.MOST_CHARACTERS)
    monkeypatch.setattr(page, "MOST_IN_ALL", 6)  # three points on one test
    for metrics, bound in ((("mrr@10",), 2), (("mrr@10", "hit_rate@1"), 1)):
        assert names(page_data(*load(tmp_path / "out", metrics))["bound"], bound)


@pytest.mark.parametrize("what", ["missing", "changed", "damaged"])
def test_questions_whose_data_is_gone_are_shown_by_id(tmp_path, what):
    write_grid(tmp_path / "out", {"uber": UBER})
    path = tmp_path / "uber.json"
    if what == "missing":
        path.unlink()
    elif what == "damaged":
        path.write_text("{")
    else:
        make_questions(4, question="another {}").save(path, format="llamaindex")
    found = page_data(*load(tmp_path / "out"))
    changed = found["changed"]["uber"]
    first = changed["points"]["mrr@10"][1]["questions"][0]
    assert changed["questions"][first["question"]] == ("q1", "")
    assert "passage" not in first
    assert names(found["notes"][-1], "uber", path)


def test_no_text_can_leave_the_data(tmp_path):
    points = [{"data": HAZARD}, {"data": "x"}]
    questions = make_questions(4, question=HAZARD + " {}", passage=HAZARD + " {}")
    ranks = {place: found for place, found in UBER.items() if place[0] < 2}
    write_grid(tmp_path / "out", {"uber": ranks}, points=points, datasets={"uber": questions})
    results, effects = load(tmp_path / "out")
    text = format_page(results, effects)
    found = data_in(text)
    assert found["points"][0]["values"]["data"] == HAZARD
    assert found["changed"]["uber"]["questions"][0] == ["q1", f"{HAZARD} 1"]
    template = page.TEMPLATE.read_text()
    assert text.count("<script") == template.count("<script") == 2
    assert text.count("</script") == template.count("</script") == 2
    assert "<!--" not in text


def test_the_page_needs_nothing_else():
    template = page.TEMPLATE.read_text()
    assert "default-src 'none'" in template
    assert not re.findall(r"<link|<img|@import|url\(|\bsrc=|\bfetch\(|XMLHttpRequest|import\(", template)
    assert re.findall(r"https?://[^\"']+", template) == ["http://www.w3.org/2000/svg"]
    assert template.count(page.PLACE) == 1


def test_the_values_of_an_axis_are_in_order_with_that_of_base(tmp_path):
    axes = {"lr": [2e-5, 1e-5], "merge": [True], "batch_size": [16, 8]}
    grid = Grid({}, axes, [{"lr": 5e-5, "merge": False, "batch_size": 32}], [0], {}, "mrr")
    assert page._axis_values(grid, "lr") == ["1e-05", "2e-05", "5e-05"]
    assert page._axis_values(grid, "merge") == ["true", "false"]
    assert page._axis_values(grid, "batch_size") == ["8", "16", "32"]


def test_infinity_and_nothing_are_json(tmp_path):
    same = {(point, seed): [1, 2, 3] for point in (0, 1) for seed in (0, 1)}
    write_grid(tmp_path / "out", {"uber": same})
    found = data_in(format_page(*load(tmp_path / "out")))
    assert [row.get("questions_needed") for row in found["rows"]] == [None, "inf"]
    assert found["changed"]["uber"]["points"]["mrr@10"]["1"]["questions"] == []


def test_the_command_writes_the_page(tmp_path, capsys):
    write_grid(tmp_path / "out", {"uber": UBER})
    assert main(["report", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report" / "report.html").read_text() == format_page(*load(tmp_path / "out"))


# In a browser.


def in_browser(text: str, folder: Path, script: str, *, view: str = "", width: int = 1280) -> dict:
    """What `script`, run on the page, returns, and the errors of the page."""
    folder.mkdir(exist_ok=True)
    watch = "<script>const errors = []; addEventListener('error', event => errors.push(event.message));</script>"
    after = f"""<script>
      const press = (element, key) => element.dispatchEvent(new KeyboardEvent('keydown', {{key, bubbles: true}}));
      const choose = (id, value) => {{ $(id).value = value; $(id).dispatchEvent(new Event('input')); }};
      const all = (path, read) => [...document.querySelectorAll(path)].map(read);
      const column = place => all(`#points td:nth-child(${{place}})`, e => e.textContent);
      const run = () => {{ {script} }};
      parent.postMessage(JSON.stringify({{value: run(), errors}}), '*');
    </script>"""
    changed = text.replace("<head>", f"<head>{watch}", 1).replace("</body>", f"{after}</body>")
    (folder / "page.html").write_text(changed, encoding="utf-8")
    # In a frame, because Chromium makes no window narrower than 500 pixels.
    frame = f'<iframe src="page.html#{view}" style="width: {width}px; height: 900px; border: 0"></iframe>'
    show = "onmessage = event => { document.getElementById('result').textContent = event.data; };"
    (folder / "frame.html").write_text(f'<pre id="result"></pre><script>{show}</script>{frame}')
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--hide-scrollbars", "--virtual-time-budget=5000", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="result">(.*?)</pre>', done.stdout, flags=re.DOTALL) or [done.stderr]
    found = json.loads(html.unescape(found))
    assert found["errors"] == []
    return found["value"]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH")


@pytest.fixture
def text(tmp_path) -> str:
    questions = make_questions(4, question=HAZARD + " {}")
    write_grid(tmp_path / "out", {"uber": UBER, "facts": FACTS, "validation": UBER}, datasets={"uber": questions})
    return format_page(*load(tmp_path / "out", ("mrr@10", "hit_rate@1")))


@needs_browser
@pytest.mark.slow
def test_sort_filter_and_choose_by_keyboard(text, tmp_path):
    script = """
      const told = {start: column(1), selected: document.querySelector('tr[aria-selected=true]').dataset.point};
      document.querySelector('button[data-key=mean]').click();
      told.rising = column(4);
      told.focused = document.activeElement.dataset.key;
      told.sorts = all('#points th', e => e.ariaSort).filter(e => e !== 'none');
      document.querySelector('button[data-key=mean]').click();
      told.falling = column(4);
      document.querySelector('button[data-key=difference]').click();
      told.emptyLast = column(6);
      choose('filter', 'temperature=0.02');
      told.filtered = column(1);
      told.filteredChanges = document.querySelectorAll('#changes tbody tr').length;
      choose('filter', '');
      const rows = [...document.querySelectorAll('#points tbody tr')];
      told.focusable = rows.every(row => row.tabIndex === 0);
      rows[0].focus(); press(rows[0], 'ArrowDown');
      told.moved = document.activeElement === rows[1];
      press(rows.find(row => row.dataset.point === '2'), 'Enter');
      told.chosen = $('point').value;
      told.focus = document.activeElement.id;
      told.questions = all('#questions li', e => [...e.children].map(p => p.textContent));
      choose('point', '1'); choose('side', 'worse');
      told.worse = document.querySelectorAll('#questions li').length;
      choose('test', 'facts'); choose('side', '');
      told.facts = [column(4), document.querySelectorAll('#questions li').length];
      choose('metric', 'hit_rate@1');
      told.hits = column(4);
      choose('test', 'uber');
      told.said = [$('said').textContent];
      choose('point', '2'); choose('metric', 'mrr@10');
      told.said.push($('said').textContent);
      choose('point', '1'); choose('metric', 'hit_rate@1');
      told.changedHits = all('#questions .ranks:nth-child(2)', e => e.textContent);
      choose('test', 'facts');
      told.address = location.hash;
      return told;"""
    told = in_browser(text, tmp_path / "browser", script)
    assert (told["start"], told["selected"]) == (["0 (base)", "1 (chosen)", "2"], "1")
    assert told["rising"] == ["0.3438", "0.3688", "0.6188"]
    assert told["falling"] == told["rising"][::-1]
    assert (told["focused"], told["sorts"]) == ("mean", ["ascending"])
    assert told["emptyLast"] == ["−0.0250", "+0.2500", ""]
    assert (told["filtered"], told["filteredChanges"]) == (["2"], 1)
    assert told["focusable"]
    assert told["moved"]
    assert (told["chosen"], told["focus"]) == ("2", "detail")
    ((question, numbers, of, passage),) = told["questions"]
    assert question == f"{HAZARD} 3"
    assert numbers == "mrr@10 0.2250 → 0.1250 (−0.1000), rank 4, 5 → 4, none"
    assert (of, passage) == ("beginning of d3", "passage 3")
    assert told["worse"] == 0
    assert told["facts"] == [["0.5833", "0.8333", "0.7500"], 1]
    assert told["hits"] == ["0.1667", "0.6667", "0.5000"]
    assert all(
        text in said for text, said in zip(("2 questions of uber", "1 question of uber"), told["said"], strict=True)
    )
    assert told["changedHits"] == [
        "hit_rate@1 0.0000 → 1.0000 (+1.0000), rank 2, 2 → 1, 1",
        "hit_rate@1 0.0000 → 0.5000 (+0.5000), rank 2, 2 → 1, 2",
    ]
    assert "test=facts" in told["address"]


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways(text, tmp_path, theme):
    script = """
      const ink = () => getComputedStyle(document.body).color;
      const told = {width: innerWidth, over: document.documentElement.scrollWidth - innerWidth, before: ink()};
      told.labels = all('#points tr:nth-child(2) td', e => e.dataset.label);
      $('theme').click();
      told.after = ink();
      told.theme = document.documentElement.dataset.theme;
      return told;"""
    told = in_browser(text, tmp_path / "browser", script, view=f"theme={theme}", width=375)
    assert (told["width"], told["over"]) == (375, 0)
    assert told["before"] != told["after"]
    assert told["theme"] == {"light": "dark", "dark": "light"}[theme]
    assert told["labels"][:4] == ["Point", "lr", "loss.temperature", "mrr@10"]


@needs_browser
@pytest.mark.slow
def test_three_long_keys_fit_a_laptop(tmp_path):
    keys = ("mine_every", "num_negatives", "mine_relative_margin")
    write_grid(tmp_path / "out", {"uber": UBER, "facts": FACTS}, points=[dict.fromkeys(keys, i) for i in range(3)])
    script = "return [...all('.scroll', e => e.scrollWidth - e.clientWidth), ...all('th', e => e.textContent)];"
    points, changes, *labels = in_browser(format_page(*load(tmp_path / "out")), tmp_path / "browser", script)
    assert (points, changes) == (0, 0)
    assert {*keys, "Peak, GiB"} < set(labels)


@needs_browser
@pytest.mark.slow
def test_a_curve_for_each_axis_by_hand(tmp_path):
    points = [{"lr": value} for value in ("1e-5", "2e-5", "3e-5")]
    write_grid(tmp_path / "out", {"uber": UBER}, points=points)
    results, effects = load(tmp_path / "out")
    script = """
      const bars = all('line.interval', e => [+e.getAttribute('y1'), +e.getAttribute('y2')]);
      const dots = all('circle', e => +e.getAttribute('cy'));
      const base = +document.querySelector('line[stroke-dasharray]').getAttribute('y1');
      return {bars, dots, base, label: document.querySelector('svg').getAttribute('aria-label')};"""
    told = in_browser(format_page(results, effects), tmp_path / "browser", script)
    means = [one.mean for one in effects]
    assert told["label"] == "mrr@10 on uber by lr: " + ", ".join(
        f"{point['lr']} {mean:.4f}" for point, mean in zip(points, means, strict=True)
    )
    # Heights are linear in the value, so two means give the scale.
    scale = (told["dots"][1] - told["dots"][0]) / (means[1] - means[0])
    height = [told["dots"][0] + scale * (value - means[0]) for value in means]
    assert told["dots"] == pytest.approx(height)
    assert told["base"] == pytest.approx(told["dots"][0])
    low, high = effects[1].from_base.interval
    ends = [told["dots"][0] + scale * end for end in (low, high)]  # from BASE's mean
    assert told["bars"][1] == pytest.approx(ends)
    assert told["bars"][0][0] == told["bars"][0][1]


@needs_browser
@pytest.mark.slow
def test_hostile_views_and_small_grids(text, tmp_path):
    """An unknown view falls back, and a grid of one finished point has a page too."""
    told = in_browser(
        text, tmp_path / "browser", "return column(1);", view="test=x&metric=y&sort=-z&point=length&side=%3C"
    )
    assert told == ["0 (base)", "1 (chosen)", "2"]
    write_grid(tmp_path / "one", {"uber": {(0, 0): [1, 2]}}, points=[{"lr": 1}])
    one = format_page(*load(tmp_path / "one"))
    script = "return [column(1), document.querySelector('caption').textContent];"
    assert in_browser(one, tmp_path / "browser", script) == [
        ["0 (base)"],
        "2 questions in 2 clusters. 1 of 1 point. Choose one to see its questions.",
    ]
