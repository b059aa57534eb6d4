"""Keeps libraries from reporting what is used: nothing leaves the machine but what is asked for.

Imported before they are; who wants to be counted sets the variables to 1.
"""

import os
import sys

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# datasets asks a public host for a file that does not exist, to have local loading counted.
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
if "datasets" in sys.modules and os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] == "0":
    sys.modules["datasets"].config.HF_UPDATE_DOWNLOAD_COUNTS = False
