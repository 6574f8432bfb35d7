"""Text in, RetrievalDataset and batches out."""
