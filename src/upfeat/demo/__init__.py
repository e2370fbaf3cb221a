"""Web page of ``upfeat demo``.

``session`` computes results, ``visits`` stores photographs, ``answers`` makes messages of results,
``page`` shows these by Gradio.
"""

import os

# Before any module here imports Gradio, which would report each start to its makers.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
