"""Parts of bench_ddp.py and time_to_loss.py: how ranks are started, what each does, the results and their report."""
