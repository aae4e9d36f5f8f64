"""The command line: parse, call, print. Errors become exit codes here and nowhere else."""
