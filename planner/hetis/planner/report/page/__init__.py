"""Plans as one page of HTML that needs no network: values to blocks, blocks to a template.

Charts are SVG of our own, not Plotly's: they are bars, bands and lines that need no script, follow light, dark and
print by CSS, and keep the page at some 30 kB, where Plotly's script alone has several megabytes.
"""
