"""Leave Python: the model as a graph of plain operations, for other runtimes."""
