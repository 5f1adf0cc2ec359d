"""Reports of a run folder: tables and trees for a terminal."""
