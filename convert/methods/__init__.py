"""One conversion method per file: statistics -> MoEPlan."""
