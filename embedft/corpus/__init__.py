"""Documents in, a RetrievalDataset out: PDF, chunks, questions, cleaning."""
