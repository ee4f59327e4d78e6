"""What is fast, and what is not: each benchmark prints its table and writes JSON rows."""
