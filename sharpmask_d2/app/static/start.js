// Sends a photograph to the server: an uploaded, dropped or pasted file as a data URL, or the number of an example.
const input = element.querySelector("input");
const upload_area = element.querySelector(".upload");
const problem = element.querySelector(".problem");
const limit = props.value.max_bytes;

function send(file) {
  if (!file) return;
  problem.textContent = "";
  if (file.size > limit) {
    problem.textContent = "This file has " + (file.size / 1e6).toFixed(1) + " MB, more than " + limit / 1e6 + " MB: make it smaller.";
    return;
  }
  const reader = new FileReader();
  reader.onload = () => trigger("upload", { name: file.name || "photograph", data: reader.result });
  reader.onerror = () => { problem.textContent = "This file cannot be read."; };
  reader.readAsDataURL(file);
}

input.addEventListener("change", () => { send(input.files[0]); input.value = ""; });
for (const kind of ["dragenter", "dragover"])
  upload_area.addEventListener(kind, (event) => { event.preventDefault(); upload_area.classList.add("over"); });
for (const kind of ["dragleave", "drop"])
  upload_area.addEventListener(kind, () => upload_area.classList.remove("over"));
upload_area.addEventListener("drop", (event) => { event.preventDefault(); send(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); send(file); }
});

const examples = element.querySelector(".examples");
props.value.examples.forEach((example, number) => {
  const button = document.createElement("button");
  const image = document.createElement("img");
  button.type = "button";
  button.title = example.name;
  image.src = example.thumbnail;
  image.alt = "Photograph " + example.name;
  button.append(image);
  button.addEventListener("click", () => { problem.textContent = ""; trigger("example", { number }); });
  examples.append(button);
});
