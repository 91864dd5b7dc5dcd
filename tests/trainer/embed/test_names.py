from streaming import storage
from trainer.embed.job import Job
from trainer.embed.options import EmbedOptions


def test_slides_whose_names_fill_what_a_disk_allows_have_files_of_their_own() -> None:
    long = [storage.ObjectInfo(f"/slides/{letter * 125}{end}.svs", 1, "1") for letter in "üö" for end in "ab"]
    job = Job("model", "digest", "/out", EmbedOptions(), {})
    names = [storage.name_of(job.file(info)) for info in long]
    assert len(set(names)) == 4
    assert all(len(name.encode()) <= 255 for name in names)
    notes = [Job("model", "digest", "/out", EmbedOptions(format="h5"), {}).note(info) for info in long]
    assert all(note is not None and len(storage.name_of(note).encode()) <= 255 for note in notes)
