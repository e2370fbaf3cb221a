"""The web page of ``upfeat demo``: ``session`` does the work, ``page`` shows it with Gradio."""
