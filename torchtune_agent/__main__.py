"""`python -m torchtune_agent ...` is `tune ...`, for those who turned torch's autoload off.

With TORCH_DEVICE_BACKEND_AUTOLOAD=0 torch never tells `tune` of us. Here we tell it ourselves:

    python -m torchtune_agent run --nproc_per_node 2 agent_sft_distributed --config tiny/agent_sft
"""

from torchtune_agent._tune import autoload


def main() -> None:
    """Registers our recipes and hands over to torchtune, which reads `sys.argv` and calls itself `tune`."""
    autoload()
    from torchtune._cli.tune import main as tune  # imports torch, which takes seconds

    tune()


if __name__ == "__main__":
    main()
