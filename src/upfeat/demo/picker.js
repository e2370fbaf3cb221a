// The picker: bundled photographs, and an upload of the visitor's, sent as the unchanged file.
const limit = Number(element.querySelector("[data-limit]").dataset.limit);
const say = (text) => document.dispatchEvent(new CustomEvent("upfeat-say", { detail: text }));

// Mark the bundled photograph that is shown, if any.
document.addEventListener("upfeat-photo", (event) => {
  for (const button of element.querySelectorAll("button[data-photo]")) {
    button.setAttribute("aria-pressed", button.dataset.photo === event.detail);
  }
});

element.addEventListener("click", (event) => {
  const sample = event.target.closest("button[data-photo]");
  if (!sample) return;
  say({ busy: "Computing features…" });
  trigger("choose", { photo: sample.dataset.photo });
});

element.addEventListener("change", async (event) => {
  if (event.target.type !== "file" || !event.target.files.length) return;
  const file = event.target.files[0];
  event.target.value = "";
  if (file.size > limit) {
    say({ error: `${file.name} is larger than ${limit / 1048576} MiB; save it smaller first` });
    return;
  }
  say({ busy: "Computing features…" });
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { name: file.name, data: reader.result.split(",")[1] || "" });
  reader.onerror = () => say({ error: `${file.name} cannot be read` });
  reader.readAsDataURL(file);
});
