"""The paper's tables and figures from real runs: plans, trainings, statistics, the report."""
