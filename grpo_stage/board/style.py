"""The look of our part of the Board, and the one script of its pages."""

from gradio.context import Context


# Gradio's gray for explanations has a contrast of 2.6 to 1 on white; WCAG 2.2 (success criterion 1.4.3) asks for 4.5.
_CSS = """
.grpo { --block-info-text-color: var(--neutral-600); --body-text-color-subdued: var(--neutral-600);
        --input-placeholder-color: var(--neutral-500); }
.dark .grpo { --block-info-text-color: var(--neutral-300); --body-text-color-subdued: var(--neutral-300);
              --input-placeholder-color: var(--neutral-400); }
"""


def add_style() -> None:
    """Add our style to the page that is being built."""
    page = Context.root_block
    assert page is not None
    page.css = f"{page.css or ''}{_CSS}"
