"""Presents a job to people: in the Prefect UI, in the terminal and in reports."""
