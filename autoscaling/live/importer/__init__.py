"""History from traces and access logs, so that a new installation isn't blind: `import_file`."""

from __future__ import annotations

from autoscaling.live.importer.files import Progress
from autoscaling.live.importer.importer import Import, Options, Report, import_file
from autoscaling.live.importer.names import Names

__all__ = ["Import", "Names", "Options", "Progress", "Report", "import_file"]
