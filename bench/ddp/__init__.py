"""Parts of bench_ddp.py: what is compared, on what work, one rank's part, the results and their report."""
