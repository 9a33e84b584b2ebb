"""Plans: a graph that cuDNN has turned into kernels. Built once for each problem, kept in the process and in the user's cache.

A graph that cuDNN refuses, or takes longer to build than the limit, is remembered with the reason and not asked for again; what is
refused, but not what was too slow, is in the user's cache too, for that GPU and these versions.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import environment
from ..files import replace_file
from . import library
from .graphs import ROLES, GraphProblem, build

#: Seconds for one plan. Plans are built one after another until one is good, and the clock is read between them: cuDNN can't be
#: interrupted in the middle of one.
LIMIT_S = 60.0
PLAN, REFUSAL = ".plan", ".refused"


class Refused(RuntimeError):
    """cuDNN does not take a graph. The message says why. `lasting` tells whether cuDNN would answer the same again."""

    def __init__(self, reason: str, lasting: bool = True):
        super().__init__(reason)
        self.lasting = lasting


@dataclass(frozen=True)
class Plan:
    """A graph that is ready to run on one GPU."""

    graph: Any  #: a `cudnn.pygraph`
    workspace_bytes: int
    device: torch.device

    def run(self, tensors: Mapping[str, Tensor]) -> None:
        """Run it on the current stream: `tensors`, read and written, by role.

        Its workspace comes from PyTorch's allocator, so that a CUDA graph may capture it.
        """
        workspace = torch.empty(max(self.workspace_bytes, 1), dtype=torch.uint8, device=self.device)
        pointers = {ROLES.index(role) + 1: tensor.data_ptr() for role, tensor in tensors.items()}
        self.graph.execute(pointers, workspace.data_ptr(), handle=library.handle(self.device))


def words(error: Exception) -> str:
    """cuDNN's message, shortened to one line: its first sentence, and the last reason that it gives."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    reasons = re.findall(r"(CUDNN_STATUS_\w+); Reason: (.+?)(?= Warning:| Error:|$)", text)
    if reasons:
        status, reason = next((pair for pair in reasons if pair[0] != "CUDNN_STATUS_SUCCESS"), reasons[0])
        return f"{status}: {reason.strip()}"[:200]
    return text[:200] or type(error).__name__


def proposed(problem: GraphProblem, **options: Any) -> Any:
    """The graph of a problem with the plans that cuDNN proposes, none of them built. `options` are those of `cudnn.pygraph`.

    Raises Refused.
    """
    cudnn = library.frontend()
    graph = build(problem, **options)
    try:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        notes = cudnn.numerical_note
        if problem.deterministic:
            graph.deselect_numeric_notes([notes.NONDETERMINISTIC])
        if problem.dtype == "float32" and not problem.tf32:
            graph.deselect_numeric_notes([notes.DOWN_CONVERT_INPUTS])
        graph.check_support()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise Refused(words(error)) from error
    return graph


def compiled(problem: GraphProblem, limit_s: float = LIMIT_S, **options: Any) -> Any:
    """The graph of a problem with the first of cuDNN's plans that builds. `options` are those of `cudnn.pygraph`: a handle.

    Raises Refused.
    """
    ends = time.monotonic() + limit_s
    cudnn = library.frontend()
    graph = proposed(problem, **options)
    plans, last = graph.get_execution_plan_count(), "cuDNN proposes no plan"
    for index in range(plans):
        if time.monotonic() > ends:
            raise Refused(f"no plan was built within {limit_s:.0f} s: {index} of {plans} failed", lasting=False)
        try:
            graph.build_plan_at_index(index)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            last = words(error)
        else:
            return graph
    raise Refused(f"none of {plans} plans could be built: {last}")


class Plans:
    """The plans of one GPU."""

    def __init__(self, device: torch.device, versions: str, folder: Path | None = None, limit_s: float = LIMIT_S):
        """`versions` names the GPU and all that a plan depends on; `folder` is that of the user's cache where none is given."""
        self.device, self.versions, self.limit_s = device, versions, limit_s
        self.folder = folder or environment.cache_dir() / "cudnn"
        self._known: dict[GraphProblem, Plan | str] = {}

    def get(self, problem: GraphProblem) -> Plan | str:
        """The plan, or a sentence that says why there is none.

        Raises RuntimeError where a plan would have to be built while a CUDA graph is captured.
        """
        if problem not in self._known:
            self._known[problem] = self._found(problem)
        return self._known[problem]

    def refuse(self, problem: GraphProblem, reason: str) -> None:
        """Take no plan for the problem in this process."""
        self._known[problem] = reason

    def _found(self, problem: GraphProblem) -> Plan | str:
        if reason := problem.why_not():
            return reason
        if (refused := self.path(problem, REFUSAL)).exists() and (reason := self._read_refusal(refused)):
            return reason
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a plan of cuDNN for {problem.graph} can't be built while a CUDA graph is captured; run the step once before"
            )
        try:
            return self._restored(problem) or self._built(problem)
        except Refused as refusal:
            if refusal.lasting:
                self._write(refused, json.dumps({"problem": str(problem), "versions": self.versions, "reason": str(refusal)}).encode())
            return str(refusal)

    def path(self, problem: GraphProblem, suffix: str) -> Path:
        """The file of a problem in the user's cache."""
        name = hashlib.sha256(f"{self.versions}\n{ROLES}\n{problem}".encode()).hexdigest()[:24]
        return self.folder / f"{problem.graph}-{name}{suffix}"

    @staticmethod
    def _read_refusal(path: Path) -> str | None:
        try:
            reason = json.loads(path.read_bytes())["reason"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # cut off, or no file of ours: asking again mends it
            return None
        return reason if isinstance(reason, str) else None

    def _built(self, problem: GraphProblem) -> Plan:
        # A handle is of the device that is current when a plan is built, too, which need not be that of the tensors.
        with torch.cuda.device(self.device) if torch.cuda.is_available() else nullcontext():
            graph = compiled(problem, self.limit_s, handle=library.handle(self.device))
            with suppress(RuntimeError):  # not every engine can be serialised
                self._write(self.path(problem, PLAN), bytes(graph.serialize()))
            return Plan(graph, graph.get_workspace_size(), self.device)

    def _restored(self, problem: GraphProblem) -> Plan | None:
        """A plan from the user's cache; None where the cache has none, or cuDNN does not take it."""
        path = self.path(problem, PLAN)
        if not path.exists():
            return None
        cudnn = library.frontend()
        try:
            with torch.cuda.device(self.device):
                graph = cudnn.pygraph(handle=library.handle(self.device))
                graph.deserialize(list(path.read_bytes()))
                return Plan(graph, graph.get_workspace_size(), self.device)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError, TypeError, ValueError, OSError):
            path.unlink(missing_ok=True)  # of another version, or cut off
            return None

    def _write(self, path: Path, content: bytes) -> None:
        """Write to the user's cache. It may be read-only, and that is no error."""
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda file: file.write(content))


_plans: dict[int, Plans] = {}


def plans_of(device: torch.device) -> Plans:
    """The plans of a GPU, shared by all threads."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _plans:
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        versions = f"{name} {capability} cudnn {library.library_version()} frontend {library.frontend().__version__}"
        _plans[index] = Plans(torch.device("cuda", index), versions)
    return _plans[index]
