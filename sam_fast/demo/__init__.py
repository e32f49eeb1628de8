"""The demo: SAM against its base optimizer on real images (``python -m sam_fast demo``).

Nothing is imported here, so that ``python -m sam_fast`` starts with torch alone; ``sam_fast.demo.cli`` is the entry and
loads the rest once the demo really runs.
"""
