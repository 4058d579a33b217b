"""The web page `magnet-fast app`: a picture and sentences in, masks out. Needs the extra `app`, Gradio.

`segmenters` says which models there are, `answer` what they found, `showing` and `files` what becomes of it, `page`
puts it on a page, `serving` serves that.
"""
