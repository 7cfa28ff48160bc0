"""The whole chain from one recipe: stages, their engine, studies, the run folder."""
