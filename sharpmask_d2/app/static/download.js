// Saves the file that the server sends. It goes from memory to memory: neither side writes it elsewhere.
watch("value", () => {
  const file = props.value;
  const line = element.querySelector("p");
  line.textContent = "";
  if (!file || !file.content) return;
  const content = Uint8Array.from(atob(file.content), (character) => character.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: file.media_type }));
  link.download = file.name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  line.textContent = "Saved " + file.name + " (" + Math.max(1, Math.round(content.length / 1000)) + " kB).";
});
