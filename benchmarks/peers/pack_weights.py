"""MODEL packed without loss, beside it.

python pack_weights.py MODEL
"""

import sys
from pathlib import Path

from hermes.checkpoint.pack import pack

model = Path(sys.argv[1])
pack(model, model.with_name(f"{model.name}.packed"))
