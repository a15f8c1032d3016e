"""The paper's experiments, from chains of trainings to figures beside its claims."""
