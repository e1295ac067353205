document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-copies]");
  if (!button) return;
  const line = document.getElementById(button.dataset.copies);
  const select = () => {
    getSelection().selectAllChildren(line);
    if (!document.execCommand("copy")) throw new Error("refused");
  };
  const told = (text) => { button.textContent = text; setTimeout(() => { button.textContent = "Copy"; }, 2000); };
  (navigator.clipboard ? navigator.clipboard.writeText(line.textContent) : Promise.reject())
    .catch(select).then(() => told("Copied"), () => told("Select it by hand"));
});
