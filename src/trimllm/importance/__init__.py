"""Which unit matters least: trial deletion, the field's other scores, and the choice between them."""
