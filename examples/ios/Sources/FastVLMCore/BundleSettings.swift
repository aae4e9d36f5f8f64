extension BundleConstants {
    /// How this bundle's encoder wants its pictures.
    public static var imageSettings: ImageSettings {
        guard let mode = ImageSettings.Mode(rawValue: imageMode),
            let resampling = Resampling(rawValue: imageResampling)
        else { preconditionFailure("the constants are of a newer version of fastvlm-convert") }
        return ImageSettings(
            size: imageSize, mode: mode, resampling: resampling, ground: imageGround.map(UInt8.init),
            rescaleFactor: rescaleFactor, mean: imageMean, std: imageStd)
    }

    /// How this bundle's model was taught to converse.
    public static var promptFormat: PromptFormat {
        PromptFormat(
            opening: opening, systemBefore: systemBefore, systemAfter: systemAfter, userBefore: userBefore,
            userAfter: userAfter, assistantBefore: assistantBefore, assistantAfter: assistantAfter,
            generation: generation, image: imageText, placeholder: imageToken, imagesFirst: imagesFirst)
    }
}
