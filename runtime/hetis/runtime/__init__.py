"""The software that runs on GPU nodes: the agent, and the engine that it steers."""
