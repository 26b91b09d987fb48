"""Text environments for language agents, run in worker processes on the host. Imports neither jax
nor ictjax.
"""
