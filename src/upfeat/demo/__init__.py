"""Web page of ``upfeat demo``: ``session`` computes the results, ``page`` shows them by Gradio."""
