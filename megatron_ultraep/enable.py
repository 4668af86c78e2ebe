"""Balance the experts of a Megatron job by one line at the top of its script: ``import megatron_ultraep.enable``.

The line does what :mod:`megatron_ultraep.launch` does. ``--ultraep-*`` flags may stand anywhere among the job's own
arguments; they are taken out of ``sys.argv`` here, before Megatron parses it. Under the launcher the line does nothing.
"""

import sys

from megatron_ultraep.megatron import arguments, training

if training.decision() is None:
    _ours, _others = arguments.split(sys.argv[1:])
    training.install(arguments.parse(_ours))
    sys.argv[1:] = _others
