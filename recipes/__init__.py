"""The recipes, as `tune ls` shows them. Installed as `torchtune_agent.recipes`, never as a top-level `recipes`."""
