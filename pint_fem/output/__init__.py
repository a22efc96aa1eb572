"""Pictures, ParaView files and summaries of a run."""
