"""The vllm-b200 command."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vllm_b200_plugin import demo, doctor, environment, explain
from vllm_b200_plugin.demo.checkpoint import FORMATS


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-b200", description="Faster kernels for vLLM on Hopper and Blackwell.")
    version = environment.version_of(environment.DISTRIBUTION) or "not installed"
    parser.add_argument("--version", action="version", version=f"vllm-b200-plugin {version}")
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("demo", help="serve a tiny model with the plugin and ask it a word problem")
    formats = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    serve.add_argument("--format", choices=FORMATS, default="fp8", help=f"{formats} (default: fp8)")
    serve.add_argument("--port", type=int, help="default: a free one")
    serve.add_argument("--model-dir", type=Path, help="write the checkpoint here and keep it")
    serve.add_argument("--timeout", type=float, default=600, help="seconds to wait for the server (default: 600)")
    serve.add_argument("--keep", action="store_true", help="leave the server running")
    serve.add_argument("--eager", action="store_true", help="without torch.compile and CUDA graphs")

    check = commands.add_parser(
        "doctor", help="what is installed, built and switched on, and what to do about the rest"
    )
    check.add_argument("--json", action="store_true", help="the same as JSON")

    why = commands.add_parser(
        "explain", help="which kernel every layer of a model gets on a GPU that need not be there, and why"
    )
    why.add_argument("model", help="a model's folder, a config.json, or the name of a public shape")
    why.add_argument(
        "--capability",
        nargs="+",
        default=explain.DEFAULT_CAPABILITIES,
        metavar="X.Y",
        help="compute capabilities: 9.0 (H200), 10.0 (B200), 10.3 (B300), 12.0 (RTX PRO 6000) (default: 9.0 10.0)",
    )
    why.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (default: 1)")
    why.add_argument("--ep", action="store_true", help="spread the experts over the ranks")
    why.add_argument("--stock", action="store_true", help="vLLM without the plugin")
    why.add_argument("--brief", action="store_true", help="the tables alone, without reasons")
    why.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    why.add_argument("--html", type=Path, metavar="FILE", help="the same as a page")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 fine; 1 the server failed, doctor found something to do, or a model could not be
    explained; 2 cannot run; 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "doctor":
            return doctor.run(as_json=args.json)
        if args.command == "explain":
            return explain.run(
                explain.Options(
                    args.model, tuple(args.capability), args.tp, args.ep, args.stock, args.json, args.html, args.brief
                )
            )
        return demo.run(
            demo.Options(args.format, args.port, args.model_dir, args.timeout, keep=args.keep, eager=args.eager)
        )
    except environment.CannotRun as error:
        print(f"vllm-b200: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vllm-b200: interrupted", file=sys.stderr)
        return 130
