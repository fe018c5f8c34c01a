"""A page in the browser that shows the masks of a photograph: `sharpmask app`.

Its modules without Gradio: `photographs` reads images from users, `models` shares models, `sessions` holds what each user works on,
`drawing` makes what the browser draws, `downloads` writes files. `page` builds the page with Gradio, and `server` serves it.
"""
