"""Head-to-head benchmarks: arms × tasks × seeds at one budget, null arms, statistics and a report."""
