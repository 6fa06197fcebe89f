"""A conformance kit for any mixture-of-experts layer: `check_moe(factory)`, or `moe_checks()` under pytest.

`check_part` checks a router, a mixer, a channel mixer or experts alone.

Needs torch only. Hugging Face's blocks and other packages are recognized without being imported, see
`moesaic.testing.peers`.
"""

from moesaic.testing.adapter import MoEUnderTest, Run
from moesaic.testing.conformance import check_moe, moe_checks
from moesaic.testing.harness import Check
from moesaic.testing.parts import check_decoder_parts, check_named_part, check_part
from moesaic.testing.reference import dense_moe, gated_expert
from moesaic.testing.report import CheckResult, Report, checks_of, comparison_table, status_of

__all__ = [
    "Check",
    "CheckResult",
    "MoEUnderTest",
    "Report",
    "Run",
    "check_decoder_parts",
    "check_moe",
    "check_named_part",
    "check_part",
    "checks_of",
    "comparison_table",
    "dense_moe",
    "gated_expert",
    "moe_checks",
    "status_of",
]
