"""What every test gets: no network, and no settings from the developer's own environment."""

import os

# Read by huggingface_hub when it is imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
