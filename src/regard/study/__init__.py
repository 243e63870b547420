"""Which method is worth it? Tasks and measurements that end in plain records, a table and a page."""

from regard.study.defaults import default_methods
from regard.study.progress import Progress
from regard.study.records import Comparison, Picture, Recall, Result, Settings
from regard.study.run import compare

__all__ = ["Comparison", "Picture", "Progress", "Recall", "Result", "Settings", "compare", "default_methods"]
