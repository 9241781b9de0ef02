"""What people see of a job: in the Prefect UI, in the terminal and in reports."""
