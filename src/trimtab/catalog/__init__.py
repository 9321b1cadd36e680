"""What there is, as rows: formats, targets, back ends and goals. All else looks a row up by its fields.

| file | a row is |
|---|---|
| `formats` | a format of weights and activations that a recipe may ask for, and how a layer in it is stored |
| `kv_caches` | a format of the KV cache |
| `numbers` | a type of number that is stored or multiplied |
| `backends` | an engine that serves |
| `targets` | a GPU |
| `decode_speeds` | how fast formats decoded on a device, as measured |
| `goals` | what a run is for: its measure, the sizes of its engines, and what is tried, in order |

To add one, write its row. What a row cannot say, how numbers of a new type are rounded or what a new kernel multiplies,
stands in `trimtab.runtime`, and is found by the row's fields. Nothing is imported here but the standard library.
"""
