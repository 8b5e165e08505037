"""The look of our part of the Board's pages, and their script."""

from gradio.context import Context


# Gradio's gray for explanations has a contrast of 2.6 to 1 on white, and white has 2.8 to 1 on its orange; WCAG 2.2
# (success criterion 1.4.3) asks for 4.5.
_CSS = """
.grpo { --button-primary-background-fill: #c2410c; --button-primary-background-fill-hover: #9a3412;
        --button-primary-text-color: #fff; }
.grpo { --block-info-text-color: var(--neutral-600); --body-text-color-subdued: var(--neutral-600);
        --input-placeholder-color: var(--neutral-500); --grpo-bad: #b91c1c; --grpo-good: #15803d; }
.dark .grpo { --block-info-text-color: var(--neutral-300); --body-text-color-subdued: var(--neutral-300);
              --input-placeholder-color: var(--neutral-400); --grpo-bad: #fca5a5; --grpo-good: #86efac; }
.grpo .grpo-bad { color: var(--grpo-bad); }
.grpo .grpo-good { color: var(--grpo-good); }
.grpo pre { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 20em; overflow: auto; }
.grpo .grpo-prompt { border-left: 3px solid var(--border-color-primary); padding-left: 10px; margin: 8px 0; }
.grpo li, .grpo p { overflow-wrap: anywhere; }
.grpo summary { cursor: pointer; }
.grpo a[data-grpo-field] { text-decoration: underline; font-weight: 600; color: var(--link-text-color); }
"""
# A link to a field opens the folded groups around it, and puts the cursor there. Gradio gives an open list no name,
# which a screen reader would say.
_SCRIPT = """
<script>
document.addEventListener("click", (event) => {
  const link = event.target.closest?.("a[data-grpo-field]");
  const field = link && document.getElementById(link.dataset.grpoField);
  if (!link) return;
  event.preventDefault();
  if (!field) return;
  for (let node = field.parentElement; node; node = node.parentElement)
    node.querySelector(":scope > button.label-wrap:not(.open)")?.click();
  setTimeout(() => {
    field.scrollIntoView({ block: "center" });
    field.querySelector("input, textarea, button")?.focus({ preventScroll: true });
  }, 50);
});
new MutationObserver((changes) => {
  for (const change of changes)
    for (const list of change.addedNodes) {
      if (list.nodeName !== "UL" || list.getAttribute("role") !== "listbox") continue;
      const field = list.closest(".grpo .block");
      const name = field?.querySelector("input[aria-label]")?.getAttribute("aria-label")
        ?? field?.querySelector("[data-testid=block-info]")?.textContent.trim();
      if (field) list.setAttribute("aria-label", name ?? "");
    }
}).observe(document, { childList: true, subtree: true });
</script>
"""


def add_style() -> None:
    """Add our style and script to the page that is being built."""
    page = Context.root_block
    assert page is not None
    page.css = f"{page.css or ''}{_CSS}"
    page.head = f"{page.head or ''}{_SCRIPT}"
