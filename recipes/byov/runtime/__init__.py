"""What keeps a run going: processes, checkpoints, logs, alarms."""
