"""Plans as one page of HTML that needs no network: values become blocks, and a template renders the blocks.

Charts are our own SVG: bars, bands and lines that need no script, follow light, dark and print modes by CSS, and keep
the page at about 30 kB.
"""
