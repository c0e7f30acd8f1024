/** The models to choose from. toInput: returns the model's input for the values of the form. */
export const MODELS = [
  {
    id: "fal-ai/flux-pro/kontext",
    name: "Kontext",
    purpose: "Edits an image",
    placeholder: "Make it a rainy evening, keep the faces",
    hasImageInput: true,
    toInput: ({ prompt, imageUrl }) => ({ prompt, image_url: imageUrl }),
  },
  {
    id: "fal-ai/flux/dev",
    name: "FLUX dev",
    purpose: "Generates from text",
    placeholder: "A lighthouse in thick fog, oil on canvas",
    hasImageInput: false,
    toInput: ({ prompt }) => ({ prompt }),
  },
];
