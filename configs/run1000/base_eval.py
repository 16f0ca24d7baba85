"""CORE, all 22 tasks."""

max_per_task = 500
