"""`python -m torchtune_agent report OUTPUT_DIR` makes a run's report, `... wandb-workspace` a view of a WandB project;
everything else is `tune ...`.

The latter is for those who turned torch's autoload off. With TORCH_DEVICE_BACKEND_AUTOLOAD=0 torch never tells `tune`
of us. Here we tell it ourselves:

    python -m torchtune_agent run --nproc_per_node 2 agent_sft_distributed --config tiny/agent_sft
"""

import sys

from torchtune_agent._tune import autoload


def main() -> None:
    """Makes the report or the workspace, or registers our recipes and hands `sys.argv` over to torchtune."""
    if sys.argv[1:2] == ["report"]:
        from torchtune_agent.metrics.report import main as report

        sys.exit(report(sys.argv[2:]))
    if sys.argv[1:2] == ["wandb-workspace"]:
        from torchtune_agent.metrics.workspace import main as workspace

        sys.exit(workspace(sys.argv[2:]))
    autoload()
    from torchtune._cli.tune import main as tune  # imports torch, which takes seconds

    tune()


if __name__ == "__main__":
    main()
