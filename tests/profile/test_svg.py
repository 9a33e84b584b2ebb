"""Drawings: what is written into them is text and nothing else."""

from fused_resnet.profile.svg import Drawing


def test_words_are_escaped_wherever_they_stand():
    drawing = Drawing(100, 50, "name", "sgemm<int> & more")
    drawing.text(1, 2, "sgemm<int> & more")
    drawing.bar(1, 2, 3, 4, "kind", "sgemm<int> & more")
    drawing.mark(1, 2, "circle", "kind", "sgemm<int> & more")
    drawing.mark(1, 2, "square", "kind", "sgemm<int> & more")
    assert "".join(drawing.parts).count("sgemm&lt;int&gt; &amp; more") == 5 and "<int>" not in "".join(drawing.parts)
