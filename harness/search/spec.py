"""The subject of a run by its names, from which any process can build it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from nsa_oracle.harness.errors import BackendError, error_line
from nsa_oracle.harness.interruptions import ForkReturned, exits_refused, interruptions_noted
from nsa_oracle.harness.subjects.global_state import MOST_FILES_OF_OURS, open_files
from nsa_oracle.harness.subjects.loading import line_of
from nsa_oracle.harness.subjects.subject import Subject
from nsa_oracle.starting import lacks_files


@dataclass(frozen=True)
class SubjectSpec:
    """The subject as named on the command line, from which another process can build it, and its time limit a case.

    loading_timeout: seconds within which modules must be imported where a case has no time limit; None: no limit.
    """

    backend: str | None = None
    layer: str | None = None
    case_timeout: float | None = None
    loading_timeout: float | None = None

    def build(self, device: torch.device) -> Subject:
        """Load the subject. Raises BackendError if it cannot be judged, or if its code ends the import in any way."""
        before = open_files()
        try:
            with interruptions_noted() as interruptions, exits_refused() as exits:
                subject = Subject.load(self.backend, self.layer, device, self.case_timeout, self.loading_timeout)
                exits.check_forks()
                return subject
        except ForkReturned as error:
            raise BackendError(f"{self._named}: loading it called {error_line(error)}") from None
        except (OSError, ImportError) as error:
            left = open_files() - before
            if not lacks_files(error) or left <= MOST_FILES_OF_OURS:
                raise
            raise BackendError(f"{self._named}: loading it left {left} files open, and no more can be opened") from None
        except KeyboardInterrupt as error:
            interruptions.check()
            raise BackendError(f"{self._named}: loading it raised KeyboardInterrupt{line_of(error)}") from None
        except Exception:
            raise
        except BaseException as error:  # pytest takes some of them, as those of pytest.skip, for outcomes of a test
            interruptions.check()
            reason = f"{type(error).__name__}: {error_line(error)}{line_of(error)}"
            raise BackendError(f"{self._named}: loading it raised {reason}") from None

    @property
    def _named(self) -> str:
        names = {"backend": self.backend, "layer": self.layer}
        return " or ".join(f"{kind} '{name}'" for kind, name in names.items() if name) or "optimized/"


@functools.cache
def built(spec: SubjectSpec, device: str) -> Subject:
    """``spec.build`` for a child process: once, as a process that replays a case builds its subject."""
    return spec.build(torch.device(device))
