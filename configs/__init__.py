"""The recipes' YAML configs. A package only so that they are installed, as `torchtune_agent.configs`."""
