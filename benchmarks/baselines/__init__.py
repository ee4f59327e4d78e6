"""What a user would write without this project, tuned as an expert would."""
